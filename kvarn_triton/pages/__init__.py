"""What is launched over the pages and tokens of a cache, attention aside: write, complete, cut back, read, single steps."""
