//! The attribute's layer, in the form that the macro can write as a constant.

/// What stands in `#[distributed_training(...)]`, as the macro writes it down.
///
/// The macro writes `Attribute { workers: Some(2), ..Attribute::NONE }`, so that a key of a later version does not break
/// what an earlier macro wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(hidden)]
pub struct Attribute {
    pub workers: Option<u32>,
    pub ps: Option<u32>,
    pub mode: Option<&'static str>,
    pub staleness: Option<u32>,
    pub rejoin: Option<&'static str>,
    pub seed: Option<u64>,
    pub env: Option<&'static [&'static str]>,
    pub data: Option<&'static str>,
    pub target: Option<&'static str>,
    pub repository: Option<&'static str>,
    pub image: Option<&'static str>,
    pub base: Option<&'static str>,
    pub dockerfile: Option<&'static str>,
    pub builder: Option<&'static str>,
    pub link: Option<&'static str>,
    pub architectures: Option<&'static [&'static str]>,
    pub files: Option<&'static [&'static str]>,
    pub root_certificates: Option<bool>,
    pub registry_ca: Option<&'static str>,
    pub plain_http: Option<&'static [&'static str]>,
    pub on_disconnect: Option<&'static str>,
    pub namespace: Option<&'static str>,
    pub launcher: Option<&'static str>,
    pub deadline: Option<&'static str>,
    pub keep_result: Option<&'static str>,
    pub ttl: Option<&'static str>,
    pub launch_timeout: Option<&'static str>,
    pub join_timeout: Option<&'static str>,
    pub schedule_timeout: Option<&'static str>,
    pub node_selector: Option<&'static [&'static str]>,
    pub tolerations: Option<&'static [&'static str]>,
    pub spread: Option<bool>,
    pub priority_class: Option<&'static str>,
    pub runtime_class: Option<&'static str>,
    pub labels: Option<&'static [&'static str]>,
    pub annotations: Option<&'static [&'static str]>,
    pub image_pull_secrets: Option<&'static [&'static str]>,
    pub volumes: Option<&'static [&'static str]>,
    pub service_account: Option<&'static str>,
    pub tmp_size: Option<&'static str>,
    pub runs: Option<&'static str>,
    pub cache: Option<&'static str>,
    pub worker_cpu: Option<AttributeCpu>,
    pub worker_memory: Option<&'static str>,
    pub worker_gpu: Option<&'static str>,
    pub ps_cpu: Option<AttributeCpu>,
    pub ps_memory: Option<&'static str>,
    pub ps_gpu: Option<&'static str>,
}

/// Both spellings of `cpu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(hidden)]
pub enum AttributeCpu {
    /// `cpu = 2`, `cpu = CORES`.
    Cores(u32),
    /// `cpu = "500m"`, `cpu = 1.5`.
    Text(&'static str),
}

impl Attribute {
    /// The attribute without any argument.
    pub const NONE: Self = Self {
        workers: None,
        ps: None,
        mode: None,
        staleness: None,
        rejoin: None,
        seed: None,
        env: None,
        data: None,
        target: None,
        repository: None,
        image: None,
        base: None,
        dockerfile: None,
        builder: None,
        link: None,
        architectures: None,
        files: None,
        root_certificates: None,
        registry_ca: None,
        plain_http: None,
        on_disconnect: None,
        namespace: None,
        launcher: None,
        deadline: None,
        keep_result: None,
        ttl: None,
        launch_timeout: None,
        join_timeout: None,
        schedule_timeout: None,
        node_selector: None,
        tolerations: None,
        spread: None,
        priority_class: None,
        runtime_class: None,
        labels: None,
        annotations: None,
        image_pull_secrets: None,
        volumes: None,
        service_account: None,
        tmp_size: None,
        runs: None,
        cache: None,
        worker_cpu: None,
        worker_memory: None,
        worker_gpu: None,
        ps_cpu: None,
        ps_memory: None,
        ps_gpu: None,
    };
}
