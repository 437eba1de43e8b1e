"""The async client that `droppex`, tests and other programs use."""
