"""Side-by-side measurements that print ratios; each is a script."""
