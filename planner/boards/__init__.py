"""Device specs from what people have: linker scripts, maps, ELFs, and the files of vendors."""
