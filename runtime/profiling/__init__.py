"""What an answer costs: counted work, measured time and memory, the machine."""
