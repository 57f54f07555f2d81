"""What a finished run leaves: metrics, figures, and a page to look at."""
