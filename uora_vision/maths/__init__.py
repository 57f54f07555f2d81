"""The adapted projection: its forms, their costs, and the matrices that adapters share."""
