"""One module for each kind of input: it writes a valid input once, then tries changed copies of it."""
