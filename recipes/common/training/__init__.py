"""How recipes train: the methods, the loop, and what makes a run go on after it was stopped."""
