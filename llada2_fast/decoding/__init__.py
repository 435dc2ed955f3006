"""From prompts to tokens: the rules of a row, its block on the device, the loop that refines it."""
