"""Where events go: files, MQTT, webhooks. Knows events and nothing of cameras or models; none can hold inference up."""
