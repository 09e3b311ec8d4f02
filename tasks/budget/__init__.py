"""What a layer costs on the device, and what goes for a budget. Imports no network library."""
