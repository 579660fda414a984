"""What executes, emits or draws a plan. Back ends see only graphs and plans."""
