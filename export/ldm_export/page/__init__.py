"""What pages are made of: HTML, charts and tables."""
