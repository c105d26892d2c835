"""What `make demo` and `make demo-gan` show."""
