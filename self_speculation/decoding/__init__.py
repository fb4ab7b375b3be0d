"""What every strategy shares: one generation's tokens, the choice of a token, and where the output ends."""
