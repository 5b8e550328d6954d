//! Talking to a container registry: looking up a base image, pushing an image.
