"""Doors into other people's trainers. Each is imported by whoever wants it; ``import opt8bit`` opens none."""
