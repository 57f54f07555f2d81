"""What recipes read: images and tables from a folder, a file or the hub, and the batches made of them."""
