"""The command line of a recipe: its options, and what a person sees."""
