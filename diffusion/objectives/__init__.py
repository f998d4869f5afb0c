"""Says what training minimises: losses, their weights over the timesteps, and the terms of the variational bound."""
