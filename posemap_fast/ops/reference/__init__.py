"""The oracle of every op, one module each: plain torch, float64-capable, obviously right, slow."""
