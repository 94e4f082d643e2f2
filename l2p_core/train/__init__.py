"""Training: settings (`config`), data, what is trained (`prepare`), the loop (`run`), and its files
(`resume`, `record`)."""
