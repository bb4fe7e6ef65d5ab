"""From text to rows of tokens: `sources` finds documents, `tokens` tokenises them once, the others cut rows."""
