"""`python -m fastsam.demo`: SGD and FusedSAM(SGD) side by side on real digits, with the landscapes of their minima."""
