//! The configuration as it is meant, and the one function that joins the layers into it.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::keys::{KEYS, Key};
use super::raw::{Entry, RawConfig};
use super::together::Winners;
use super::{
    Attribute, ConfigError, Env, Explanation, ImageSettings, KubernetesSettings, LaunchOptions, OnDisconnect, Origin,
    Problem, Resources, Row, Surroundings,
};
use crate::topology::{Mode, Topology};

/// What the user wants, checked: past [`Config::resolve`] every value is usable as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Config {
    /// How many workers and parameter servers, default one of each.
    pub topology: Topology,
    /// When a worker's gradient is applied, default once all workers have pushed.
    pub mode: Mode,
    /// How long the run is held for a lost worker, which is started again. Default on a cluster 5 min if there are parameter
    /// servers, else zero: it is not.
    pub rejoin: Duration,
    /// Seed of the initial parameters, of the data order and of the framework's generator, default 0.
    pub seed: u64,
    /// Names of the variables that the replicas see, default none. All valid, none fairing's own, none twice.
    pub env: Vec<String>,
    /// The folder behind `worker.data_dir()`, absolute, default none. Whether it exists is not checked.
    pub data_dir: Option<PathBuf>,
    /// Where the replicas run, default on this machine.
    pub target: Target,
    /// What the container image is made of and where it goes, for a target other than this machine.
    pub image: ImageSettings,
    /// What the run does when the process that launched it is gone: it goes on on a cluster, and ends elsewhere.
    pub on_disconnect: OnDisconnect,
    /// What is said of a run on Kubernetes.
    pub kubernetes: KubernetesSettings,
    /// The folder that gets a folder for each run, absolute. Default `fairing/runs` in Cargo's build folder.
    pub runs: PathBuf,
    /// The folder in which compressed layers are kept from one run to the next, absolute. Default `fairing/cache` in the
    /// user's folder of caches.
    pub cache: PathBuf,
    /// Whether the launch only says what it would do, default no.
    pub dry_run: bool,
    /// What each worker asks for.
    pub worker: Resources,
    /// What each parameter server asks for.
    pub ps: Resources,
}

/// Where the replicas of a run are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Target {
    /// Processes on this machine.
    Local,
    /// Containers on one engine.
    Docker,
    /// Pods of a cluster.
    Kubernetes,
}

/// A configuration and where it comes from. Returned by [`Config::resolve`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// What is meant.
    pub config: Config,
    /// Who set each value.
    pub explanation: Explanation,
}

impl Config {
    /// Joins the layers; a later one wins: defaults, `attribute`, `Fairing.toml`, variables, `options`.
    ///
    /// Performs no IO: what it needs of the file system is in `surroundings`.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`] with every unknown key or variable and every value that cannot be meant, in all layers, also
    /// where a later layer would win; and with the values that won but do not go together.
    ///
    /// # Example
    ///
    /// ```
    /// use std::collections::BTreeMap;
    /// use fairing_core::config::{Attribute, Config, LaunchOptions, Surroundings};
    ///
    /// let surroundings = Surroundings {
    ///     current: "/project".into(),
    ///     manifest: "/project".into(),
    ///     target: "/project/target".into(),
    ///     cache: "/home/me/.cache".into(),
    ///     file: Some("workers = 2".into()),
    /// };
    /// let env = BTreeMap::from([("FAIRING_WORKERS".to_string(), "4".to_string())]);
    /// let resolved = Config::resolve(&Attribute::NONE, &surroundings, &env, &LaunchOptions::new())?;
    /// assert_eq!(resolved.config.topology.worker_count(), 4);
    /// assert!(resolved.explanation.to_string().starts_with("workers  "));
    /// # Ok::<(), fairing_core::config::ConfigError>(())
    /// ```
    pub fn resolve(
        attribute: &Attribute,
        surroundings: &Surroundings,
        env: &impl Env,
        options: &LaunchOptions,
    ) -> Result<Resolved, ConfigError> {
        let mut raw = RawConfig::default();
        raw.attribute(attribute);
        if let Some(text) = &surroundings.file {
            raw.file(text, &surroundings.manifest);
        }
        raw.variables(env);
        raw.options(options);

        let RawConfig { mut entries, mut problems } = raw;
        entries.sort_by_key(|entry| (entry.layer(), KEYS.iter().position(|key| key.name == entry.key.name)));
        let mut config = Self::defaults(surroundings);
        let mut winners = Winners::new(&entries);
        for (place, Entry { key, written, origin }) in entries.iter().enumerate() {
            let base = match origin {
                Origin::Attribute | Origin::File { .. } => &surroundings.manifest,
                _ => &surroundings.current,
            };
            match (key.apply)(&mut config, written, base) {
                Ok(()) => winners.win(place),
                Err(expected) => {
                    let (origin, found) = (origin.clone(), written.to_string());
                    problems.push(Problem::Value { origin, key: key.name, found, expected });
                }
            }
        }
        winners.imply(&mut config);
        #[cfg(feature = "kubernetes")]
        config.kubernetes.pod.clone_from(&options.pod);
        let broken = |name: &str| problems.iter().any(|it| matches!(it, Problem::Value { key, .. } if *key == name));
        let together = winners.problems(&config, broken);
        problems.extend(together);
        if !problems.is_empty() {
            problems.sort_by_key(|problem| problem.origin().place());
            return Err(ConfigError::Invalid { problems });
        }
        let row = |key: &Key| Row { key: key.name, value: (key.show)(&config), origin: winners.origin(key.name) };
        let explanation = Explanation::new(KEYS.iter().map(row).collect());
        Ok(Resolved { config, explanation })
    }

    fn defaults(surroundings: &Surroundings) -> Self {
        Self {
            topology: Topology::new(1, 1),
            mode: Mode::Sync,
            rejoin: Duration::ZERO,
            seed: 0,
            env: Vec::new(),
            data_dir: None,
            target: Target::Local,
            image: ImageSettings::default(),
            on_disconnect: OnDisconnect::Stop,
            kubernetes: KubernetesSettings::default(),
            runs: surroundings.target.join("fairing").join("runs"),
            cache: surroundings.cache.join("fairing").join("cache"),
            dry_run: false,
            worker: Resources::default(),
            ps: Resources::default(),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Local => f.write_str("local"),
            Target::Docker => f.write_str("docker"),
            Target::Kubernetes => f.write_str("kubernetes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AttributeCpu, Builder, Link, Renderer};
    use expect_test::{Expect, expect};
    use std::collections::BTreeMap;

    /// A full attribute, so that each test shows which layer wins.
    const ATTRIBUTE: Attribute = Attribute {
        workers: Some(2),
        seed: Some(3),
        env: Some(&["HF_HOME"]),
        data: Some("data"),
        worker_cpu: Some(AttributeCpu::Cores(2)),
        ps_memory: Some("512Mi"),
        ..Attribute::NONE
    };

    fn resolve(
        attribute: &Attribute,
        file: &str,
        env: &[(&str, &str)],
        options: &LaunchOptions,
    ) -> Result<Resolved, ConfigError> {
        let surroundings = Surroundings {
            current: "/here".into(),
            manifest: "/project".into(),
            target: "/project/target".into(),
            cache: "/home/me/.cache".into(),
            file: Some(file.to_owned()),
        };
        let env: BTreeMap<String, String> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Config::resolve(attribute, &surroundings, &env, options)
    }

    #[track_caller]
    fn explained(file: &str, env: &[(&str, &str)], options: &LaunchOptions, expected: Expect) {
        expected.assert_eq(&resolve(&ATTRIBUTE, file, env, options).unwrap().explanation.to_string());
    }

    #[track_caller]
    fn refused(file: &str, env: &[(&str, &str)], options: &LaunchOptions, expected: Expect) {
        expected.assert_eq(&resolve(&ATTRIBUTE, file, env, options).unwrap_err().to_string());
    }

    #[test]
    fn a_run_without_any_setting_has_the_defaults() {
        let resolved = resolve(&Attribute::NONE, "", &[], &LaunchOptions::new()).unwrap();
        expect![[r#"
            workers                  1                              default
            ps                       1                              default
            mode                     sync                           default
            staleness                -                              default
            rejoin                   0s                             default
            seed                     0                              default
            env                      -                              default
            data                     -                              default
            target                   local                          default
            repository               -                              default
            image                    -                              default
            base                     -                              default
            dockerfile               -                              default
            builder                  append                         default
            link                     dynamic                        default
            architectures            -                              default
            files                    -                              default
            root_certificates        false                          default
            registry_ca              -                              default
            plain_http               -                              default
            on_disconnect            stop                           default
            namespace                -                              default
            context                  -                              default
            launcher                 jobs                           default
            deadline                 1day                           default
            keep_result              1h                             default
            ttl                      10m                            default
            launch_timeout           2m                             default
            join_timeout             10m                            default
            schedule_timeout         5m                             default
            node_selector            -                              default
            tolerations              -                              default
            spread                   true                           default
            priority_class           -                              default
            runtime_class            -                              default
            labels                   -                              default
            annotations              -                              default
            image_pull_secrets       -                              default
            volumes                  -                              default
            service_account          -                              default
            tmp_size                 256Mi                          default
            runs                     /project/target/fairing/runs   default
            cache                    /home/me/.cache/fairing/cache  default
            detach                   false                          default
            another                  false                          default
            check_nodes              true                           default
            dry_run                  false                          default
            resources.worker.cpu     -                              default
            resources.worker.memory  -                              default
            resources.worker.gpu     -                              default
            resources.ps.cpu         -                              default
            resources.ps.memory      -                              default
            resources.ps.gpu         -                              default
        "#]]
        .assert_eq(&resolved.explanation.to_string());
    }

    #[test]
    fn a_later_layer_wins() {
        explained(
            "",
            &[],
            &LaunchOptions::new(),
            expect![[r#"
                workers                  2                              attribute
                ps                       1                              default
                mode                     sync                           default
                staleness                -                              default
                rejoin                   0s                             default
                seed                     3                              attribute
                env                      HF_HOME                        attribute
                data                     /project/data                  attribute
                target                   local                          default
                repository               -                              default
                image                    -                              default
                base                     -                              default
                dockerfile               -                              default
                builder                  append                         default
                link                     dynamic                        default
                architectures            -                              default
                files                    -                              default
                root_certificates        false                          default
                registry_ca              -                              default
                plain_http               -                              default
                on_disconnect            stop                           default
                namespace                -                              default
                context                  -                              default
                launcher                 jobs                           default
                deadline                 1day                           default
                keep_result              1h                             default
                ttl                      10m                            default
                launch_timeout           2m                             default
                join_timeout             10m                            default
                schedule_timeout         5m                             default
                node_selector            -                              default
                tolerations              -                              default
                spread                   true                           default
                priority_class           -                              default
                runtime_class            -                              default
                labels                   -                              default
                annotations              -                              default
                image_pull_secrets       -                              default
                volumes                  -                              default
                service_account          -                              default
                tmp_size                 256Mi                          default
                runs                     /project/target/fairing/runs   default
                cache                    /home/me/.cache/fairing/cache  default
                detach                   false                          default
                another                  false                          default
                check_nodes              true                           default
                dry_run                  false                          default
                resources.worker.cpu     2                              attribute
                resources.worker.memory  -                              default
                resources.worker.gpu     -                              default
                resources.ps.cpu         -                              default
                resources.ps.memory      512Mi                          attribute
                resources.ps.gpu         -                              default
            "#]],
        );
        let file = "workers = 3\nseed = 4\ndata = '../shared'\nresources.worker.cpu = '500m'\n[resources.ps]\nmemory = '1GB'\ncpu = 1.5";
        explained(
            file,
            &[],
            &LaunchOptions::new(),
            expect![[r#"
                workers                  3                              /project/Fairing.toml:1
                ps                       1                              default
                mode                     sync                           default
                staleness                -                              default
                rejoin                   0s                             default
                seed                     4                              /project/Fairing.toml:2
                env                      HF_HOME                        attribute
                data                     /project/../shared             /project/Fairing.toml:3
                target                   local                          default
                repository               -                              default
                image                    -                              default
                base                     -                              default
                dockerfile               -                              default
                builder                  append                         default
                link                     dynamic                        default
                architectures            -                              default
                files                    -                              default
                root_certificates        false                          default
                registry_ca              -                              default
                plain_http               -                              default
                on_disconnect            stop                           default
                namespace                -                              default
                context                  -                              default
                launcher                 jobs                           default
                deadline                 1day                           default
                keep_result              1h                             default
                ttl                      10m                            default
                launch_timeout           2m                             default
                join_timeout             10m                            default
                schedule_timeout         5m                             default
                node_selector            -                              default
                tolerations              -                              default
                spread                   true                           default
                priority_class           -                              default
                runtime_class            -                              default
                labels                   -                              default
                annotations              -                              default
                image_pull_secrets       -                              default
                volumes                  -                              default
                service_account          -                              default
                tmp_size                 256Mi                          default
                runs                     /project/target/fairing/runs   default
                cache                    /home/me/.cache/fairing/cache  default
                detach                   false                          default
                another                  false                          default
                check_nodes              true                           default
                dry_run                  false                          default
                resources.worker.cpu     500m                           /project/Fairing.toml:4
                resources.worker.memory  -                              default
                resources.worker.gpu     -                              default
                resources.ps.cpu         1500m                          /project/Fairing.toml:7
                resources.ps.memory      1G                             /project/Fairing.toml:6
                resources.ps.gpu         -                              default
            "#]],
        );
        let env = [
            ("FAIRING_WORKERS", "5"),
            ("FAIRING_DATA", "./sets"),
            ("FAIRING_ENV", "A, B"),
            ("FAIRING_WORKER_MEMORY", "2Gi"),
            ("FAIRING_PLACEMENT_RANK", "0"),
            ("PATH", "/bin"),
        ];
        explained(
            file,
            &env,
            &LaunchOptions::new(),
            expect![[r#"
                workers                  5                              FAIRING_WORKERS
                ps                       1                              default
                mode                     sync                           default
                staleness                -                              default
                rejoin                   0s                             default
                seed                     4                              /project/Fairing.toml:2
                env                      A,B                            FAIRING_ENV
                data                     /here/sets                     FAIRING_DATA
                target                   local                          default
                repository               -                              default
                image                    -                              default
                base                     -                              default
                dockerfile               -                              default
                builder                  append                         default
                link                     dynamic                        default
                architectures            -                              default
                files                    -                              default
                root_certificates        false                          default
                registry_ca              -                              default
                plain_http               -                              default
                on_disconnect            stop                           default
                namespace                -                              default
                context                  -                              default
                launcher                 jobs                           default
                deadline                 1day                           default
                keep_result              1h                             default
                ttl                      10m                            default
                launch_timeout           2m                             default
                join_timeout             10m                            default
                schedule_timeout         5m                             default
                node_selector            -                              default
                tolerations              -                              default
                spread                   true                           default
                priority_class           -                              default
                runtime_class            -                              default
                labels                   -                              default
                annotations              -                              default
                image_pull_secrets       -                              default
                volumes                  -                              default
                service_account          -                              default
                tmp_size                 256Mi                          default
                runs                     /project/target/fairing/runs   default
                cache                    /home/me/.cache/fairing/cache  default
                detach                   false                          default
                another                  false                          default
                check_nodes              true                           default
                dry_run                  false                          default
                resources.worker.cpu     500m                           /project/Fairing.toml:4
                resources.worker.memory  2Gi                            FAIRING_WORKER_MEMORY
                resources.worker.gpu     -                              default
                resources.ps.cpu         1500m                          /project/Fairing.toml:7
                resources.ps.memory      1G                             /project/Fairing.toml:6
                resources.ps.gpu         -                              default
            "#]],
        );
        let options = LaunchOptions::new()
            .workers(6)
            .ps(2)
            .mode(Mode::Bounded { staleness: 4 })
            .rejoin(Duration::from_secs(90))
            .seed(u64::MAX)
            .env(["C"])
            .data("sets")
            .target(Target::Local)
            .repository("localhost:5000/a")
            .base("debian:12")
            .builder(Builder::Append)
            .link(Link::Static)
            .architectures(["arm64"])
            .files(["./labels.txt", "words/en.txt"])
            .root_certificates(true)
            .registry_ca("ca.pem")
            .plain_http(["a:80", "b"])
            .on_disconnect(OnDisconnect::Stop)
            .namespace("team-a")
            .context("kind-kind")
            .launcher(Renderer::JobSet)
            .deadline(Duration::from_secs(7200))
            .keep_result(Duration::from_secs(60))
            .ttl(Duration::ZERO)
            .launch_timeout(Duration::from_secs(60))
            .join_timeout(Duration::from_secs(61))
            .schedule_timeout(Duration::from_secs(62))
            .node_selector(["disk=ssd"])
            .tolerations(["a=b:NoSchedule", "*"])
            .spread(false)
            .priority_class("low")
            .runtime_class("gvisor")
            .labels(["team=vision", "a.b/c="])
            .annotations(["note=any text, really"])
            .image_pull_secrets(["login"])
            .volumes(["pvc:datasets:/data:ro", "empty:10Gi:/scratch"])
            .service_account("trainer")
            .tmp_size("1Gi".parse().unwrap())
            .runs("/runs")
            .cache("layers")
            .detach(false)
            .another(true)
            .check_nodes(false)
            .dry_run(true)
            .worker_resources(Resources { cpu: Some("3".parse().unwrap()), memory: None, gpu: None })
            .ps_resources(Resources { cpu: None, memory: Some("4Gi".parse().unwrap()), gpu: None });
        explained(
            file,
            &env,
            &options,
            expect![[r#"
                workers                  6                                          LaunchOptions
                ps                       2                                          LaunchOptions
                mode                     async                                      LaunchOptions
                staleness                4                                          LaunchOptions
                rejoin                   1m 30s                                     LaunchOptions
                seed                     18446744073709551615                       LaunchOptions
                env                      C                                          LaunchOptions
                data                     /here/sets                                 LaunchOptions
                target                   local                                      LaunchOptions
                repository               localhost:5000/a                           LaunchOptions
                image                    -                                          default
                base                     debian:12                                  LaunchOptions
                dockerfile               -                                          default
                builder                  append                                     LaunchOptions
                link                     static                                     LaunchOptions
                architectures            arm64                                      LaunchOptions
                files                    labels.txt,words/en.txt                    LaunchOptions
                root_certificates        true                                       LaunchOptions
                registry_ca              /here/ca.pem                               LaunchOptions
                plain_http               a:80,b                                     LaunchOptions
                on_disconnect            stop                                       LaunchOptions
                namespace                team-a                                     LaunchOptions
                context                  kind-kind                                  LaunchOptions
                launcher                 jobset                                     LaunchOptions
                deadline                 2h                                         LaunchOptions
                keep_result              1m                                         LaunchOptions
                ttl                      0s                                         LaunchOptions
                launch_timeout           1m                                         LaunchOptions
                join_timeout             1m 1s                                      LaunchOptions
                schedule_timeout         1m 2s                                      LaunchOptions
                node_selector            disk=ssd                                   LaunchOptions
                tolerations              a=b:NoSchedule,*                           LaunchOptions
                spread                   false                                      LaunchOptions
                priority_class           low                                        LaunchOptions
                runtime_class            gvisor                                     LaunchOptions
                labels                   a.b/c=,team=vision                         LaunchOptions
                annotations              note=any text, really                      LaunchOptions
                image_pull_secrets       login                                      LaunchOptions
                volumes                  pvc:datasets:/data:ro,empty:10Gi:/scratch  LaunchOptions
                service_account          trainer                                    LaunchOptions
                tmp_size                 1Gi                                        LaunchOptions
                runs                     /runs                                      LaunchOptions
                cache                    /here/layers                               LaunchOptions
                detach                   false                                      LaunchOptions
                another                  true                                       LaunchOptions
                check_nodes              false                                      LaunchOptions
                dry_run                  true                                       LaunchOptions
                resources.worker.cpu     3                                          LaunchOptions
                resources.worker.memory  2Gi                                        FAIRING_WORKER_MEMORY
                resources.worker.gpu     -                                          default
                resources.ps.cpu         1500m                                      /project/Fairing.toml:7
                resources.ps.memory      4Gi                                        LaunchOptions
                resources.ps.gpu         -                                          default
            "#]],
        );
    }

    #[test]
    fn what_is_explained_is_what_is_meant() {
        let Resolved { config, explanation } = resolve(&ATTRIBUTE, "", &[], &LaunchOptions::new()).unwrap();
        assert_eq!(config.topology, Topology::new(2, 1));
        assert_eq!((config.seed, config.env), (3, vec!["HF_HOME".to_owned()]));
        assert_eq!(config.data_dir, Some("/project/data".into()));
        assert_eq!(config.runs, PathBuf::from("/project/target/fairing/runs"));
        assert_eq!(config.worker, Resources { cpu: Some("2".parse().unwrap()), memory: None, gpu: None });
        assert_eq!(config.ps, Resources { cpu: None, memory: Some("512Mi".parse().unwrap()), gpu: None });
        assert_eq!(explanation.origin("workers"), Some(&Origin::Attribute));
        assert_eq!(explanation.origin("nothing"), None);
    }

    #[test]
    fn every_problem_of_every_layer_is_listed_at_once() {
        let file = "workers = 'two'\nwrokers = 2\nps = -1\nmode = 'asinc'\nrejoin = '30'\n[worker]\ncpu = 2\n[resources.ps]\nmemory = '1Gbb'\nmemroy = 1\n";
        let env = [("FAIRING_WORKER", "2"), ("FAIRING_SEED", "-1"), ("FAIRING_TARGET", "moon"), ("FAIRING_X", "")];
        let options = LaunchOptions::new().env(["A=1"]).rejoin(Duration::from_secs(3601)).runs("");
        refused(
            file,
            &env,
            &options,
            expect![[r#"
                invalid configuration, 15 problems:
                  /project/Fairing.toml:1: `workers` is "two"; expected a whole number from 1
                  /project/Fairing.toml:2: unknown key `wrokers`; did you mean `workers`?
                  /project/Fairing.toml:3: `ps` is -1; expected a whole number from 0
                  /project/Fairing.toml:4: `mode` is "asinc"; expected "sync" or "async"; did you mean "async"?
                  /project/Fairing.toml:5: `rejoin` is "30"; expected a duration such as "30s" or "2m" (a unit is missing)
                  /project/Fairing.toml:6: unknown key `worker`; did you mean `resources.worker`?
                  /project/Fairing.toml:9: `resources.ps.memory` is "1Gbb"; expected a size such as "512Mi" or "2GB"; did you mean "1GB"?
                  /project/Fairing.toml:10: unknown key `resources.ps.memroy`; did you mean `resources.ps.memory`?
                  unknown variable `FAIRING_WORKER`; did you mean `FAIRING_WORKERS`?
                  unknown variable `FAIRING_X`
                  FAIRING_SEED: `seed` is "-1"; expected a whole number from 0
                  FAIRING_TARGET: `target` is "moon"; expected "local", "docker" or "kubernetes"
                  LaunchOptions: `rejoin` is 1h 1s; expected at most "1h"
                  LaunchOptions: `env` is ["A=1"]; expected for "A=1" the name alone, "A"; the value is that of the launcher
                  LaunchOptions: `runs` is ""; expected the path of a folder"#]],
        );
    }

    #[test]
    fn one_problem_is_one_line() {
        let files = [
            "workers = 0",
            "workers = '2'",
            "workers = 4294967296",
            "seed = 1.5",
            "seed = 99999999999999999999999999999999999999999",
            "ps = { cpu = 2 }",
            "mode = 'bounded'",
            "mode = true",
            "staleness = '4'",
            "staleness = -1",
            "rejoin = 30",
            "rejoin = '30 min'",
            "rejoin = '1h 1ms'",
            "env = 'A'",
            "env = ['A', 2]",
            "env = ['A', 'A']",
            "data = true",
            "target = true",
            "target = 'moon'",
            "repository = ''",
            "repository = 'team/name'",
            "repository = 'https://registry.example/a'",
            "repository = 'https://me:hunter2@registry.example/a'",
            "repository = 'registry.example/Team'",
            "repository = 'registry.example/a:1'",
            "image = 2",
            "base = 'debian 12'",
            "dockerfile = ''",
            "builder = 'podman'",
            "link = 'Static'",
            "architectures = 'arm64'",
            "architectures = ['aarch64']",
            "architectures = ['arm64', 'arm64']",
            "files = ['/etc/passwd']",
            "files = [true]",
            "root_certificates = 'true'",
            "root_certificates = 1",
            "registry_ca = false",
            "plain_http = ['http://a']",
            "on_disconnect = 'go on'",
            "namespace = 'Team'",
            "context = ''",
            "launcher = 'tf-job'",
            "deadline = '500ms'",
            "keep_result = '8785h'",
            "ttl = 600",
            "launch_timeout = '30'",
            "launch_timeout = '0s'",
            "join_timeout = '0s'",
            "schedule_timeout = '1500ms'",
            "node_selector = 'disk=ssd'",
            "node_selector = ['disk=ssd', 'disk=hdd']",
            "tolerations = ['a:noexecute']",
            "spread = 'no'",
            "priority_class = 'High'",
            "runtime_class = 1",
            "labels = ['fairing.dev/run=a']",
            "annotations = ['note']",
            "image_pull_secrets = ['_']",
            "volumes = ['pvc:data']",
            "volumes = ['pvc:a:/data', 'empty:1Gi:/data']",
            "service_account = ''",
            "tmp_size = '1'",
            "cache = []",
            "detach = 'yes'",
            "dry_run = 'yes'",
            "resources.worker.gpu = 'two'",
            "resources.ps.gpu = -1",
            "resources.worker.memory = 1024",
            "resources.worker = 2",
            "resources = 2",
            "seed 3",
            "seed = 3\nseed = 3",
        ];
        let variables = [
            ("FAIRING_ENV", "A,FAIRING_SEED"),
            ("FAIRING_WORKERS", ""),
            ("FAIRING_PS_CPU", "0"),
            ("FAIRING_DRY_RUN", "yes"),
            ("FAIRING_BASE", ""),
            ("FAIRING_PLAIN_HTTP", "a,b:x"),
        ];
        let files = files.map(|file| (file, None)).into_iter();
        let cases = files.chain(variables.map(|variable| ("", Some(variable))));
        let message = |(file, variable): (&str, Option<_>)| {
            let error = resolve(&Attribute::NONE, file, variable.as_slice(), &LaunchOptions::new()).unwrap_err();
            error.to_string().replace("invalid configuration: ", "") + "\n"
        };
        expect![[r#"
            /project/Fairing.toml:1: `workers` is 0; expected a whole number from 1
            /project/Fairing.toml:1: `workers` is "2"; expected the number 2 without quotes
            /project/Fairing.toml:1: `workers` is 4294967296; expected a smaller number
            /project/Fairing.toml:1: `seed` is 1.5; expected a whole number from 0
            /project/Fairing.toml:1: `seed` is a number out of range; expected a whole number from 0
            /project/Fairing.toml:1: `ps` is a table; expected a whole number from 0 (resources go into `[resources.ps]`)
            /project/Fairing.toml:1: `mode` is "bounded"; expected "sync" or "async" (bounded asynchrony is `staleness = 4`)
            /project/Fairing.toml:1: `mode` is `true`; expected "sync" or "async" (bounded asynchrony is `staleness = 4`)
            /project/Fairing.toml:1: `staleness` is "4"; expected the number 4 without quotes
            /project/Fairing.toml:1: `staleness` is -1; expected a whole number from 0
            /project/Fairing.toml:1: `rejoin` is 30; expected a duration such as "30s" or "2m" (a unit is missing)
            /project/Fairing.toml:1: `rejoin` is "30 min"; expected a duration such as "30s" or "2m"
            /project/Fairing.toml:1: `rejoin` is "1h 1ms"; expected at most "1h"
            /project/Fairing.toml:1: `env` is "A"; expected a list of names, such as ["HF_HOME"]
            /project/Fairing.toml:1: `env` is ["A", 2]; expected a list of names, such as ["HF_HOME"]
            /project/Fairing.toml:1: `env` is ["A", "A"]; expected "A" once
            /project/Fairing.toml:1: `data` is `true`; expected the path of a folder
            /project/Fairing.toml:1: `target` is `true`; expected "local", "docker" or "kubernetes"
            /project/Fairing.toml:1: `target` is "moon"; expected "local", "docker" or "kubernetes"
            /project/Fairing.toml:1: `repository` is ""; expected a host and a path, such as "registry.example/team/name"
            /project/Fairing.toml:1: `repository` is "team/name"; expected the host of the registry in front, such as "docker.io/team/name"
            /project/Fairing.toml:1: `repository` is "https://registry.example/a"; expected a host and a path, such as "registry.example/team/name", without `https://`
            /project/Fairing.toml:1: `repository` is "...@registry.example/a"; expected a host and a path, such as "registry.example/team/name", without a user or a password (`docker login` keeps them)
            /project/Fairing.toml:1: `repository` is "registry.example/Team"; expected lower case, "registry.example/team"
            /project/Fairing.toml:1: `repository` is "registry.example/a:1"; expected the name alone, "registry.example/a" (what is pushed has a tag and a digest of its own)
            /project/Fairing.toml:1: `image` is 2; expected the name of an image, such as "debian:12"
            /project/Fairing.toml:1: `base` is "debian 12"; expected the name of an image, such as "debian:12"
            /project/Fairing.toml:1: `dockerfile` is ""; expected the path of a Dockerfile
            /project/Fairing.toml:1: `builder` is "podman"; expected "append" or "docker"
            /project/Fairing.toml:1: `link` is "Static"; expected "dynamic" or "static"; did you mean "static"?
            /project/Fairing.toml:1: `architectures` is "arm64"; expected a list of architectures, such as ["arm64"]
            /project/Fairing.toml:1: `architectures` is ["aarch64"]; expected for "aarch64" "arm64", as images call it
            /project/Fairing.toml:1: `architectures` is ["arm64", "arm64"]; expected "arm64" once
            /project/Fairing.toml:1: `files` is ["/etc/passwd"]; expected for "/etc/passwd" a relative path without `..`, such as "labels.txt"
            /project/Fairing.toml:1: `files` is [`true`]; expected a list of paths, such as ["labels.txt"]
            /project/Fairing.toml:1: `root_certificates` is "true"; expected `true` without quotes
            /project/Fairing.toml:1: `root_certificates` is 1; expected `true` or `false`
            /project/Fairing.toml:1: `registry_ca` is `false`; expected the path of a PEM file
            /project/Fairing.toml:1: `plain_http` is ["http://a"]; expected for "http://a" the host of a registry, such as "registry.example:5000", without `http://`
            /project/Fairing.toml:1: `on_disconnect` is "go on"; expected "stop" or "continue"
            /project/Fairing.toml:1: `namespace` is "Team"; expected the name of a namespace, such as "team-a" (at most 63 of `a-z`, `0-9` and `-`)
            /project/Fairing.toml:1: `context` is ""; expected the name of a context in the kubeconfig
            /project/Fairing.toml:1: `launcher` is "tf-job"; expected "jobs", "jobset", "tfjob" or "auto"; did you mean "tfjob"?
            /project/Fairing.toml:1: `deadline` is "500ms"; expected at least "1s"
            /project/Fairing.toml:1: `keep_result` is "8785h"; expected at most "8784h", a year
            /project/Fairing.toml:1: `ttl` is 600; expected a duration such as "30s" or "2m" (a unit is missing)
            /project/Fairing.toml:1: `launch_timeout` is "30"; expected a duration such as "30s" or "2m" (a unit is missing)
            /project/Fairing.toml:1: `launch_timeout` is "0s"; expected at least "1s"
            /project/Fairing.toml:1: `join_timeout` is "0s"; expected at least "1s"
            /project/Fairing.toml:1: `schedule_timeout` is "1500ms"; expected whole seconds
            /project/Fairing.toml:1: `node_selector` is "disk=ssd"; expected a list of labels of nodes, such as ["disk=ssd"]
            /project/Fairing.toml:1: `node_selector` is ["disk=ssd", "disk=hdd"]; expected `disk` once
            /project/Fairing.toml:1: `tolerations` is ["a:noexecute"]; expected for "a:noexecute" as its effect "NoSchedule", "PreferNoSchedule" or "NoExecute"; did you mean "NoExecute"?
            /project/Fairing.toml:1: `spread` is "no"; expected `true` or `false`
            /project/Fairing.toml:1: `priority_class` is "High"; expected the name of an object in the cluster, such as "data-1" (at most 253 of `a-z`, `0-9`, `-` and `.`)
            /project/Fairing.toml:1: `runtime_class` is 1; expected the name of an object in the cluster, such as "data-1" (at most 253 of `a-z`, `0-9`, `-` and `.`)
            /project/Fairing.toml:1: `labels` is ["fairing.dev/run=a"]; expected for "fairing.dev/run=a" a key of your own (`fairing.dev/` and `app.kubernetes.io/managed-by` are fairing's)
            /project/Fairing.toml:1: `annotations` is ["note"]; expected for "note" an annotation, such as "example.org/note=text"
            /project/Fairing.toml:1: `image_pull_secrets` is ["_"]; expected for "_" the name of an object in the cluster, such as "data-1" (at most 253 of `a-z`, `0-9`, `-` and `.`)
            /project/Fairing.toml:1: `volumes` is ["pvc:data"]; expected for "pvc:data" its source and path too, such as "pvc:datasets:/data:ro", "secret:token:/etc/token", "configmap:words:/etc/words" or "empty:10Gi:/scratch"
            /project/Fairing.toml:1: `volumes` is ["pvc:a:/data", "empty:1Gi:/data"]; expected one volume at `/data`
            /project/Fairing.toml:1: `service_account` is ""; expected the name of an object in the cluster, such as "data-1" (at most 253 of `a-z`, `0-9`, `-` and `.`)
            /project/Fairing.toml:1: `tmp_size` is "1"; expected a size such as "512Mi" or "2GB" (a unit is missing)
            /project/Fairing.toml:1: `cache` is []; expected the path of a folder
            /project/Fairing.toml:1: `detach` is "yes"; expected `true` or `false`
            /project/Fairing.toml:1: `dry_run` is "yes"; expected `true` or `false`
            /project/Fairing.toml:1: `resources.worker.gpu` is "two"; expected a number of GPUs such as 1, or with the resource's name "amd.com/gpu=1"
            /project/Fairing.toml:1: `resources.ps.gpu` is -1; expected a number of GPUs such as 1, or with the resource's name "amd.com/gpu=1"
            /project/Fairing.toml:1: `resources.worker.memory` is 1024; expected a size such as "512Mi" or "2GB" (a unit is missing)
            /project/Fairing.toml:1: `resources.worker` is 2; expected a table
            /project/Fairing.toml:1: `resources` is 2; expected a table
            /project/Fairing.toml:1: key with no value, expected `=`
            /project/Fairing.toml:2: duplicate key
            FAIRING_ENV: `env` is "A,FAIRING_SEED"; expected for "FAIRING_SEED" a variable of your own (those that start with `FAIRING_` are fairing's)
            FAIRING_WORKERS: `workers` is ""; expected a whole number from 1
            FAIRING_PS_CPU: `resources.ps.cpu` is "0"; expected a number of cores such as 2, "1.5" or "500m"
            FAIRING_DRY_RUN: `dry_run` is "yes"; expected `true` or `false`
            FAIRING_BASE: `base` is ""; expected the name of an image, such as "debian:12"
            FAIRING_PLAIN_HTTP: `plain_http` is "a,b:x"; expected for "b:x" the host of a registry, such as "registry.example:5000"
        "#]].assert_eq(&cases.map(message).collect::<String>());
    }

    /// An attribute, a file, variables and a mode in code.
    type Layers<'a> = (Attribute, &'a str, &'a [(&'a str, &'a str)], Option<Mode>);

    /// What each case says of modes with the place of it, or what is wrong, a line each.
    #[track_caller]
    fn together(cases: &[Layers<'_>], expected: Expect) {
        let line = |(attribute, file, env, mode): &Layers<'_>| {
            let options = mode.iter().copied().fold(LaunchOptions::new(), LaunchOptions::mode);
            let text = match resolve(attribute, file, env, &options) {
                Ok(resolved) => {
                    let rows = resolved.explanation.rows().iter();
                    let rows = rows.filter(|row| ["ps", "mode", "staleness", "rejoin"].contains(&row.key));
                    rows.map(|row| format!("{} {} ({})", row.key, row.value, row.origin)).collect::<Vec<_>>().join("; ")
                }
                Err(error) => error.to_string().replace("invalid configuration: ", ""),
            };
            text.replace("/project/", "") + "\n"
        };
        expected.assert_eq(&cases.iter().map(line).collect::<String>());
    }

    const SYNC: Attribute = Attribute { mode: Some("sync"), ..Attribute::NONE };
    const BOUNDED: Attribute = Attribute { staleness: Some(4), ..Attribute::NONE };
    const SERVERLESS: Attribute = Attribute { ps: Some(0), ..Attribute::NONE };

    #[test]
    fn staleness_alone_means_async() {
        let cases: [Layers<'_>; 4] = [
            (BOUNDED, "rejoin = '2m'", &[], None),
            (Attribute::NONE, "staleness = 0\nmode = 'async'", &[], None),
            (Attribute::NONE, "mode = 'async'", &[("FAIRING_STALENESS", "2")], None),
            (Attribute::NONE, "", &[("FAIRING_MODE", "async")], None),
        ];
        together(
            &cases,
            expect![[r#"
            ps 1 (default); mode async (attribute); staleness 4 (attribute); rejoin 2m (Fairing.toml:1)
            ps 1 (default); mode async (Fairing.toml:2); staleness 0 (Fairing.toml:1); rejoin 0s (default)
            ps 1 (default); mode async (Fairing.toml:1); staleness 2 (FAIRING_STALENESS); rejoin 0s (default)
            ps 1 (default); mode async (FAIRING_MODE); staleness - (default); rejoin 0s (default)
        "#]],
        );
    }

    #[test]
    fn a_later_mode_replaces_mode_and_staleness() {
        let cases: [Layers<'_>; 6] = [
            (BOUNDED, "", &[("FAIRING_MODE", "sync")], None),
            (BOUNDED, "mode = 'async'", &[], None),
            (SYNC, "", &[("FAIRING_MODE", "async"), ("FAIRING_STALENESS", "2")], None),
            (SYNC, "staleness = 3", &[], Some(Mode::Async)),
            (BOUNDED, "", &[("FAIRING_STALENESS", "2")], Some(Mode::Sync)),
            (SYNC, "", &[], Some(Mode::Bounded { staleness: 5 })),
        ];
        together(
            &cases,
            expect![[r#"
            ps 1 (default); mode sync (FAIRING_MODE); staleness - (FAIRING_MODE); rejoin 0s (default)
            ps 1 (default); mode async (Fairing.toml:1); staleness - (Fairing.toml:1); rejoin 0s (default)
            ps 1 (default); mode async (FAIRING_MODE); staleness 2 (FAIRING_STALENESS); rejoin 0s (default)
            ps 1 (default); mode async (LaunchOptions); staleness - (LaunchOptions); rejoin 0s (default)
            ps 1 (default); mode sync (LaunchOptions); staleness - (LaunchOptions); rejoin 0s (default)
            ps 1 (default); mode async (LaunchOptions); staleness 5 (LaunchOptions); rejoin 0s (default)
        "#]],
        );
    }

    #[test]
    fn staleness_over_sync_is_refused_with_both_places() {
        let cases: [Layers<'_>; 4] = [
            (SYNC, "", &[("FAIRING_STALENESS", "2")], None),
            (Attribute::NONE, "staleness = 3\nmode = 'sync'", &[], None),
            (Attribute { staleness: Some(1), ..SYNC }, "", &[], None),
            (SERVERLESS, "mode = 'sync'\nstaleness = 3\nrejoin = '1s'", &[], None),
        ];
        together(
            &cases,
            expect![[r#"
            FAIRING_STALENESS: `staleness` has no meaning with `mode = "sync"` (`mode` is set by attribute)
            Fairing.toml:1: `staleness` has no meaning with `mode = "sync"` (`mode` is set by Fairing.toml:2)
            attribute: `staleness` has no meaning with `mode = "sync"`
            invalid configuration, 2 problems:
              Fairing.toml:2: `staleness` has no meaning with `mode = "sync"` (`mode` is set by Fairing.toml:1)
              Fairing.toml:3: `rejoin` needs a parameter server, since a lost worker would take its share of the parameters with it; set `ps = 1` (`ps` is set by attribute)
        "#]],
        );
    }

    #[test]
    fn without_a_server_there_is_neither_async_nor_rejoin() {
        let cases: [Layers<'_>; 6] = [
            (SERVERLESS, "mode = 'sync'\nrejoin = '0s'", &[], None),
            (SERVERLESS, "rejoin = '1s'", &[("FAIRING_MODE", "async")], None),
            (BOUNDED, "", &[("FAIRING_PS", "0")], None),
            (SERVERLESS, "", &[], Some(Mode::Bounded { staleness: 5 })),
            (SERVERLESS, "", &[("FAIRING_MODE", "async"), ("FAIRING_PS", "1")], None),
            // What was asked for instead of the attribute's 0 is not known.
            (SERVERLESS, "mode = 'async'", &[("FAIRING_PS", "one")], None),
        ];
        together(
            &cases,
            expect![[r#"
            ps 0 (attribute); mode sync (Fairing.toml:1); staleness - (default); rejoin 0s (Fairing.toml:2)
            invalid configuration, 2 problems:
              Fairing.toml:1: `rejoin` needs a parameter server, since a lost worker would take its share of the parameters with it; set `ps = 1` (`ps` is set by attribute)
              FAIRING_MODE: `mode = "async"` needs a parameter server; set `ps = 1` (`ps` is set by attribute)
            attribute: `staleness` needs a parameter server; set `ps = 1` (`ps` is set by FAIRING_PS)
            LaunchOptions: `staleness` needs a parameter server; set `ps = 1` (`ps` is set by attribute)
            ps 1 (FAIRING_PS); mode async (FAIRING_MODE); staleness - (default); rejoin 0s (default)
            FAIRING_PS: `ps` is "one"; expected a whole number from 0
        "#]],
        );
    }

    /// An attribute, a file and variables.
    type Case<'a> = (Attribute, &'a str, &'a [(&'a str, &'a str)]);

    /// The settings of the image that have not their default, with the place of each, or what is wrong.
    #[track_caller]
    fn images(cases: &[Case<'_>], expected: Expect) {
        let keys = ["repository", "image", "base", "dockerfile", "builder", "link", "architectures", "files"];
        let keys = [&keys[..], &["root_certificates", "registry_ca", "plain_http", "on_disconnect"]].concat();
        let line = |(attribute, file, env): &Case<'_>| {
            let text = match resolve(attribute, file, env, &LaunchOptions::new()) {
                Ok(resolved) => {
                    let rows = resolved.explanation.rows().iter();
                    let rows = rows.filter(|row| keys.contains(&row.key) && row.origin != Origin::Default);
                    rows.map(|row| format!("{} {} ({})", row.key, row.value, row.origin)).collect::<Vec<_>>().join("; ")
                }
                Err(error) => error.to_string().replace("invalid configuration: ", ""),
            };
            text.replace("/project/", "") + "\n"
        };
        expected.assert_eq(&cases.iter().map(line).collect::<String>());
    }

    const BASED: Attribute = Attribute {
        base: Some("debian:12"),
        link: Some("static"),
        files: Some(&["labels.txt"]),
        root_certificates: Some(true),
        repository: Some("localhost:5000/a"),
        ..Attribute::NONE
    };
    const FINISHED: Attribute = Attribute { image: Some("localhost:5000/b:1"), ..Attribute::NONE };

    #[test]
    fn a_later_layer_makes_the_image_of_something_else() {
        images(
            &[
                (BASED, "", &[]),
                (BASED, "dockerfile = 'Dockerfile'", &[]),
                (BASED, "", &[("FAIRING_IMAGE", "localhost:5000/b:1")]),
                (BASED, "image = 'c'", &[("FAIRING_DOCKERFILE", "Dockerfile")]),
                (FINISHED, "", &[("FAIRING_BASE", "debian:12"), ("FAIRING_LINK", "static")]),
                (FINISHED, "image = 'c'\nfiles = []\nbuilder = 'append'", &[("FAIRING_ROOT_CERTIFICATES", "0")]),
                (Attribute { builder: Some("docker"), ..BASED }, "builder = 'append'", &[("FAIRING_FILES", "")]),
                (Attribute { builder: Some("append"), ..BASED }, "image = 'c'", &[("FAIRING_DOCKERFILE", "/D")]),
            ],
            expect![[r#"
                repository localhost:5000/a (attribute); base debian:12 (attribute); link static (attribute); files labels.txt (attribute); root_certificates true (attribute)
                repository localhost:5000/a (attribute); base - (Fairing.toml:1); dockerfile Dockerfile (Fairing.toml:1); builder docker (Fairing.toml:1); link static (attribute); files labels.txt (attribute); root_certificates true (attribute)
                repository localhost:5000/a (attribute); image localhost:5000/b:1 (FAIRING_IMAGE); base - (FAIRING_IMAGE); link dynamic (FAIRING_IMAGE); files - (FAIRING_IMAGE); root_certificates false (FAIRING_IMAGE)
                repository localhost:5000/a (attribute); image - (FAIRING_DOCKERFILE); base - (FAIRING_DOCKERFILE); dockerfile /here/Dockerfile (FAIRING_DOCKERFILE); builder docker (FAIRING_DOCKERFILE); link dynamic (Fairing.toml:1); files - (Fairing.toml:1); root_certificates false (Fairing.toml:1)
                image - (FAIRING_BASE); base debian:12 (FAIRING_BASE); link static (FAIRING_LINK)
                image c (Fairing.toml:1); builder append (Fairing.toml:3); files - (Fairing.toml:2); root_certificates false (FAIRING_ROOT_CERTIFICATES)
                repository localhost:5000/a (attribute); base debian:12 (attribute); builder append (Fairing.toml:1); link static (attribute); files - (FAIRING_FILES); root_certificates true (attribute)
                repository localhost:5000/a (attribute); image - (FAIRING_DOCKERFILE); base - (FAIRING_DOCKERFILE); dockerfile /D (FAIRING_DOCKERFILE); builder docker (FAIRING_DOCKERFILE); link dynamic (Fairing.toml:1); files - (Fairing.toml:1); root_certificates false (Fairing.toml:1)
            "#]],
        );
    }

    #[test]
    fn what_the_image_is_made_of_is_said_once() {
        let both = Attribute { image: FINISHED.image, dockerfile: Some("Dockerfile"), ..BASED };
        images(
            &[
                (both, "", &[]),
                (both, "", &[("FAIRING_IMAGE", "c")]),
                (Attribute::NONE, "dockerfile = 'a'\nbase = 'b'", &[]),
                (Attribute::NONE, "builder = 'append'", &[("FAIRING_DOCKERFILE", "a")]),
                (FINISHED, "builder = 'docker'\nfiles = ['a']", &[("FAIRING_ARCHITECTURES", "arm64")]),
                // What was asked for instead of the base is not known.
                (Attribute::NONE, "dockerfile = 'a'\nbase = 2", &[]),
            ],
            expect![[r#"
                invalid configuration, 2 problems:
                  attribute: `base` has no meaning with `image`, which is used as it is; leave one of them out
                  attribute: `dockerfile` has no meaning with `image`, which is used as it is; leave one of them out
                repository localhost:5000/a (attribute); image c (FAIRING_IMAGE); base - (FAIRING_IMAGE); dockerfile - (FAIRING_IMAGE); link dynamic (FAIRING_IMAGE); files - (FAIRING_IMAGE); root_certificates false (FAIRING_IMAGE)
                Fairing.toml:1: `base` has no meaning with `dockerfile`, which names its base itself; leave one of them out
                Fairing.toml:1: `builder = "append"` reads no `dockerfile`; leave it out or set `builder = "docker"` (`dockerfile` is set by FAIRING_DOCKERFILE)
                invalid configuration, 3 problems:
                  Fairing.toml:1: `builder` has no meaning with `image`, which is used as it is; leave one of them out (`image` is set by attribute)
                  Fairing.toml:2: `files` has no meaning with `image`, which is used as it is; leave one of them out (`image` is set by attribute)
                  FAIRING_ARCHITECTURES: `architectures` has no meaning with `image`, which is used as it is; leave one of them out (`image` is set by attribute)
                Fairing.toml:2: `base` is 2; expected the name of an image, such as "debian:12"
            "#]],
        );
    }

    #[test]
    fn a_launcher_that_goes_ends_its_run() {
        images(
            &[
                (Attribute::NONE, "on_disconnect = 'continue'", &[]),
                (Attribute { on_disconnect: Some("continue"), ..Attribute::NONE }, "on_disconnect = 'stop'", &[]),
            ],
            expect![[r#"
                Fairing.toml:1: `on_disconnect = "continue"` needs `target = "kubernetes"`; with `target = "local"` a run ends with its launcher (`target` is set by default)
                on_disconnect stop (Fairing.toml:1)
            "#]],
        );
    }

    #[cfg(feature = "docker")]
    #[test]
    fn several_architectures_need_a_place_that_takes_them() {
        let several = Attribute { architectures: Some(&["amd64", "arm64"]), ..Attribute::NONE };
        images(
            &[
                (several, "", &[]),
                (several, "", &[("FAIRING_TARGET", "docker")]),
                (several, "repository = 'localhost/a'", &[("FAIRING_TARGET", "docker")]),
                (several, "", &[("FAIRING_TARGET", "docker"), ("FAIRING_ARCHITECTURES", "arm64")]),
                (several, "builder = 'docker'", &[]),
                (several, "dockerfile = 'a'", &[]),
                (
                    several,
                    "on_disconnect = 'continue'",
                    &[("FAIRING_TARGET", "docker"), ("FAIRING_REPOSITORY", "a.b/c")],
                ),
            ],
            expect![[r#"
                architectures amd64,arm64 (attribute)
                attribute: several `architectures` need a `repository`, since an engine takes the image of one from its launcher (`target` is set by FAIRING_TARGET)
                repository localhost/a (Fairing.toml:1); architectures amd64,arm64 (attribute)
                architectures arm64 (FAIRING_ARCHITECTURES)
                attribute: several `architectures` need `builder = "append"`, since an engine builds for one at a time (`builder` is set by Fairing.toml:1)
                attribute: several `architectures` need `builder = "append"`, since an engine builds for one at a time (`dockerfile` is set by Fairing.toml:1)
                Fairing.toml:1: `on_disconnect = "continue"` needs `target = "kubernetes"`; with `target = "docker"` a run ends with its launcher (`target` is set by FAIRING_TARGET)
            "#]],
        );
    }

    #[test]
    fn the_target_docker_is_there_if_it_is_compiled_in() {
        let target = resolve(&Attribute::NONE, "target = 'docker'", &[], &LaunchOptions::new().target(Target::Docker));
        match target {
            Ok(resolved) => assert!(cfg!(feature = "docker") && resolved.config.target == Target::Docker),
            Err(error) => {
                assert!(!cfg!(feature = "docker") && error.to_string().contains("feature `docker`"), "{error}")
            }
        }
    }

    /// What clusters have to do with, with the place of each, or what is wrong.
    #[cfg(feature = "kubernetes")]
    #[track_caller]
    fn clusters(cases: &[Case<'_>], expected: Expect) {
        let keys = ["ps", "rejoin", "target", "on_disconnect", "repository", "image", "detach", "resources.worker.gpu"];
        let line = |(attribute, file, env): &Case<'_>| {
            let text = match resolve(attribute, file, env, &LaunchOptions::new()) {
                Ok(resolved) => {
                    let rows = resolved.explanation.rows().iter();
                    let rows = rows.filter(|row| keys.contains(&row.key) && row.value != "-");
                    rows.map(|row| format!("{} {} ({})", row.key, row.value, row.origin)).collect::<Vec<_>>().join("; ")
                }
                Err(error) => error.to_string().replace("invalid configuration: ", ""),
            };
            text.replace("/project/", "") + "\n"
        };
        expected.assert_eq(&cases.iter().map(line).collect::<String>());
    }

    #[cfg(feature = "kubernetes")]
    #[test]
    fn a_cluster_needs_an_image_and_has_defaults_of_its_own() {
        let cluster = Attribute { target: Some("kubernetes"), repository: Some("a.b/c"), ..Attribute::NONE };
        let bare = Attribute { repository: None, ..cluster };
        clusters(
            &[
                (cluster, "", &[]),
                (cluster, "rejoin = '0s'\non_disconnect = 'continue'", &[("FAIRING_DETACH", "1")]),
                (cluster, "ps = 0", &[("FAIRING_WORKER_GPU", "2")]),
                (bare, "image = 'a.b/c:1'", &[]),
                (bare, "", &[]),
                (bare, "on_disconnect = 'stop'\nwrokers = 2", &[("FAIRING_TTL", "1")]),
                (Attribute::NONE, "repository = 'c'", &[("FAIRING_TARGET", "kubernetes")]),
                (Attribute::NONE, "image = ''", &[("FAIRING_TARGET", "kubernetes")]),
                (cluster, "resources.worker.gpu = 1", &[("FAIRING_TARGET", "docker"), ("FAIRING_DETACH", "1")]),
                (
                    Attribute { worker_gpu: Some("1"), ..cluster },
                    "",
                    &[("FAIRING_TARGET", "local"), ("FAIRING_WORKER_GPU", "0")],
                ),
            ],
            expect![[r#"
                ps 1 (default); rejoin 5m (default); target kubernetes (attribute); repository a.b/c (attribute); on_disconnect continue (default); detach false (default)
                ps 1 (default); rejoin 0s (Fairing.toml:1); target kubernetes (attribute); repository a.b/c (attribute); on_disconnect continue (Fairing.toml:2); detach true (FAIRING_DETACH)
                ps 0 (Fairing.toml:1); rejoin 0s (default); target kubernetes (attribute); repository a.b/c (attribute); on_disconnect continue (default); detach false (default); resources.worker.gpu nvidia.com/gpu=2 (FAIRING_WORKER_GPU)
                ps 1 (default); rejoin 5m (default); target kubernetes (attribute); image a.b/c:1 (Fairing.toml:1); on_disconnect continue (default); detach false (default)
                attribute: `target = "kubernetes"` needs a `repository` that the cluster pulls from, such as "registry.example/team/name" (set FAIRING_REPOSITORY), or a finished `image`
                invalid configuration, 4 problems:
                  attribute: `target = "kubernetes"` needs a `repository` that the cluster pulls from, such as "registry.example/team/name" (set FAIRING_REPOSITORY), or a finished `image`
                  Fairing.toml:1: `on_disconnect = "stop"` has no meaning with `target = "kubernetes"`, where a run goes on without its launcher; leave it out (`target` is set by attribute)
                  Fairing.toml:2: unknown key `wrokers`; did you mean `workers`?
                  FAIRING_TTL: `ttl` is "1"; expected a duration such as "30s" or "2m" (a unit is missing)
                Fairing.toml:1: `repository` is "c"; expected a host and a path, such as "registry.example/team/name"
                Fairing.toml:1: `image` is ""; expected the name of an image, such as "debian:12"
                invalid configuration, 2 problems:
                  Fairing.toml:1: `resources.worker.gpu` needs `target = "kubernetes"`; it has no meaning with `target = "docker"` (`target` is set by FAIRING_TARGET)
                  FAIRING_DETACH: `detach` needs `target = "kubernetes"`; it has no meaning with `target = "docker"` (`target` is set by FAIRING_TARGET)
                ps 1 (default); rejoin 0s (default); target local (FAIRING_TARGET); repository a.b/c (attribute); on_disconnect stop (default); detach false (default)
            "#]],
        );
    }

    #[cfg(feature = "kubernetes")]
    #[test]
    fn closures_reach_the_configuration() {
        use crate::topology::Role;
        use k8s_openapi::api::core::v1::PodTemplateSpec;

        let options = LaunchOptions::new().pod(|role, pod: &mut PodTemplateSpec| {
            pod.metadata.get_or_insert_default().name = Some(role.to_string());
        });
        assert_eq!(options, options.clone());
        assert_ne!(options, LaunchOptions::new().pod(|_, _| {}));
        let config = resolve(&Attribute::NONE, "", &[], &options).unwrap().config;
        let mut pod = PodTemplateSpec::default();
        config.kubernetes.pod.apply(Role::Ps, &mut pod);
        assert_eq!(pod.metadata.unwrap().name.as_deref(), Some("ps"));
    }

    #[test]
    fn a_variable_writes_true_as_a_word_or_as_1() {
        for (text, expected) in [("1", true), ("true", true), ("0", false), ("false", false)] {
            let resolved =
                resolve(&Attribute::NONE, "dry_run = true", &[("FAIRING_DRY_RUN", text)], &LaunchOptions::new());
            assert_eq!(resolved.unwrap().config.dry_run, expected, "{text}");
        }
    }

    #[test]
    fn paths_of_the_image_are_meant_from_where_they_stand() {
        let attribute = Attribute { dockerfile: Some("./Dockerfile"), registry_ca: Some("ca.pem"), ..Attribute::NONE };
        let env = [("FAIRING_FILES", "./a,a, b/c"), ("FAIRING_REGISTRY_CA", "other.pem"), ("FAIRING_CACHE", "layers")];
        let Config { image, cache, .. } = resolve(&attribute, "", &env, &LaunchOptions::new()).unwrap().config;
        assert_eq!((image.dockerfile, image.builder), (Some("/project/Dockerfile".into()), Builder::Docker));
        assert_eq!((image.registry_ca, cache), (Some("/here/other.pem".into()), PathBuf::from("/here/layers")));
        // Files alone keep their relative path: it is the one in the image.
        assert_eq!(image.files, [PathBuf::from("a"), PathBuf::from("b/c")]);
    }

    #[test]
    fn rejoin_counts_whole_milliseconds() {
        let rejoin =
            |time| resolve(&Attribute::NONE, "", &[], &LaunchOptions::new().rejoin(time)).unwrap().config.rejoin;
        assert_eq!(rejoin(Duration::from_micros(1_500_700)), Duration::from_millis(1500));
        assert_eq!(rejoin(Duration::from_secs(3600)), Duration::from_secs(3600));
        assert_eq!(rejoin(Duration::from_micros(999)), Duration::ZERO);
    }

    #[test]
    fn the_examples_of_the_documentation_are_accepted() {
        let rows = include_str!("mod.rs").lines().filter(|line| line.starts_with("//! | `"));
        for row in rows {
            let example = row.split('|').map(str::trim).nth(5).unwrap().trim_matches('`');
            let resolved = resolve(&Attribute::NONE, example, &[], &LaunchOptions::new()).unwrap();
            let (key, _) = example.split_once(" = ").unwrap();
            assert!(matches!(resolved.explanation.origin(key), Some(Origin::File { line: 1, .. })), "{example}");
        }
    }
}
