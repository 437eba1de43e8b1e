"""The code that reedsolo defines, the kernels that apply it, and chunks to pieces with checksums."""
