"""What `pcam bundle` copies onto every stick: nothing here imports the library."""
