"""What the project trains and draws on machines without real weights."""
