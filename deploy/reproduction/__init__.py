"""`unigrpo reproduce`: the paper's rows and ablations in small, over several seeds, and a page to compare them."""
