"""Operations of this package's own, one file each: the reference that runs on CPU, then kernels for GPUs."""
