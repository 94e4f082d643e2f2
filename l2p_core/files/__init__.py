"""How this program writes files."""
