"""Who holds what memory. Knows torch, not Kandinsky."""
