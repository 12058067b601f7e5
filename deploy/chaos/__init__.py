"""`unigrpo chaos`: a job whose actors, nodes and driver are killed while it trains, and what must hold at its end."""
