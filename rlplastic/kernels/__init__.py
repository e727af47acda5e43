"""Hot loops, one file each: the plain torch reference, and beside it what replaces it where that is faster."""
