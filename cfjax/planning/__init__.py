"""What a compiled program costs, read from the program: memory, FLOPs, collectives."""
