"""Building blocks of HTML pages: documents, charts and tables."""
