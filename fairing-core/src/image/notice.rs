//! What a person should know about an image that can be built and may still not run.

use std::fmt;

/// Something about a program that its image cannot make up for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The program loads libraries of a driver at run time, and there is no base image that could have them.
    LoadsAtRunTime {
        /// `CUDA`, `Vulkan` and the like.
        libraries: Vec<&'static str>,
    },
    /// The program was compiled for the processor of this very machine.
    NativeProcessor,
    /// The program uses a base image's C library, which has to be new enough.
    NewestGlibc {
        /// The oldest version that does.
        version: (u32, u32),
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Notice::LoadsAtRunTime { libraries } => write!(
                f,
                "the program seems to load {} at run time, which an image without a base does not have (set `base = \
                 \"...\"` to an image that has it)",
                libraries.join(" and ")
            ),
            Notice::NativeProcessor => write!(
                f,
                "the program is compiled with `target-cpu=native`, so it may stop with an illegal instruction on another \
                 machine (name the cluster's processor instead, such as `x86-64-v3`)"
            ),
            Notice::NewestGlibc { version: (major, minor) } => write!(
                f,
                "the program needs glibc {major}.{minor} or newer in its base image (or `link = \"static\"`, which needs none)"
            ),
        }
    }
}
