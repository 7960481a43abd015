"""What Everedit claims about speed, memory and quality, measured: ``make bench`` and ``make results``."""
