"""The report on a bundle's precisions."""
