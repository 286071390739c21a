"""ImageNet-LT: lists of files, decoding and augmentation, batches for any number of processes."""
