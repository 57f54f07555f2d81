"""What a weight is: a matrix, its rows, the kind of its module, and tensors that are stored otherwise."""
