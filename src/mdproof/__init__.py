"""mdproof: what a Markdown page shows is what ran."""
