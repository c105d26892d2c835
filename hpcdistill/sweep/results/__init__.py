"""Results as the papers' tables, a CSV and a page."""
