"""A step of a server: plan it once, then write and attend in every layer; read a cache back, move raw pages."""
