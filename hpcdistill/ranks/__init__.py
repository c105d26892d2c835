"""The processes of a distributed run: who they are, how they find one another, and what happens when one fails."""
