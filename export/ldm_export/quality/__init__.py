"""How close a bundle's results are to what they should be."""
