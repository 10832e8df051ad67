"""Steps that plans are made of."""
