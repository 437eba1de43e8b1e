"""The pool's shard store: the interface, the real one on a disk, and the simulated one."""
