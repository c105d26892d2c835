"""Many runs: their identity and their reports."""
