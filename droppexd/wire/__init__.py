"""How roles talk: messages and their codec, request and reply, and the transports beneath."""
