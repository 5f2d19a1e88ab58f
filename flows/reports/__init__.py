"""What a run found, recorded, published and shows."""
