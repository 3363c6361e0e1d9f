use super::*;

#[test]
fn sizes_are_read() {
    assert_eq!(parse_size("28x32"), Ok([28, 32]));
    assert_eq!(parse_size("224"), Ok([224, 224]));
    assert!(parse_size("28x").is_err() && parse_size("a").is_err() && parse_size("1x2x3").is_err());
    assert!(shape([8, 8], 2).is_err() && shape([0, 8], 1).is_err() && shape([8, 8], 3).is_ok());
}

#[test]
fn shards_are_named_after_their_folder() {
    assert_eq!(default_name(Path::new("some/train-28")), "train-28");
    assert_eq!(default_name(Path::new("some/two words")), "data");
    assert_eq!(default_name(Path::new("/")), "data");
}

fn args(sources: &[&Path], from: Kind, split: Option<Split>) -> PackArgs {
    PackArgs {
        sources: sources.iter().map(|path| path.to_path_buf()).collect(),
        out: PathBuf::from("out"),
        from,
        labels: None,
        classes: None,
        split,
        shards: ShardArgs { shard_size: None, name: None, replace: false, output: Output::Table },
    }
}

#[test]
fn the_split_picks_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for split in ["train", "t10k"] {
        for kind in ["images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"] {
            fs::write(root.join(format!("{split}-{kind}")), "").unwrap();
        }
    }
    let chosen = |split| match choose_source(&args(&[root], Kind::Auto, split)).unwrap() {
        PackSource::Idx { images, labels } => [images, labels.unwrap()].map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            name.split('-').next().unwrap().to_string()
        }),
        other => panic!("{other:?}"),
    };
    assert_eq!(chosen(None), ["train", "train"]);
    assert_eq!(chosen(Some(Split::Train)), ["train", "train"]);
    assert_eq!(chosen(Some(Split::Test)), ["t10k", "t10k"]);
    let pair = [root.join("t10k-images-idx3-ubyte.gz"), root.join("train-labels-idx1-ubyte.gz")];
    let source = choose_source(&args(&[&pair[0], &pair[1]], Kind::Auto, None)).unwrap();
    assert!(matches!(source, PackSource::Idx { labels: Some(labels), .. } if labels == pair[1]));
}

#[test]
fn folders_of_images() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir(root.join("val")).unwrap();
    let source = choose_source(&args(&[root], Kind::Auto, Some(Split::Test))).unwrap();
    assert_eq!(source, PackSource::Folder(root.join("val")));
    for wrong in [
        args(&[root], Kind::Idx, None),
        args(&[root], Kind::Auto, Some(Split::Train)),
        args(&[root, root], Kind::Auto, None),
        PackArgs { labels: Some(root.join("l")), ..args(&[root], Kind::Auto, None) },
    ] {
        let error = choose_source(&wrong).unwrap_err();
        let coded: &crate::Coded = error.downcast_ref().unwrap();
        assert_eq!(coded.code, exit::USAGE, "{error}");
    }
}

#[test]
fn parts_of_a_data_set_are_no_classes() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let source = PackSource::Folder(root.to_path_buf());
    let warned = |make: &str| {
        fs::create_dir(root.join(make)).unwrap();
        classes::parts(&source).map(|text| text.replace(&root.display().to_string(), "DIR"))
    };
    assert_eq!(warned(".cache"), None);
    let start = "by their names the folders in `DIR` are parts of a data set and no classes:";
    let give = "give one of these folders, such as";
    assert_eq!(warned("Val").unwrap(), format!("{start} Val; {give} `DIR/Val`"));
    assert_eq!(warned("cars"), None, "one of several may be a class");
    let text = format!("{start} train, Val; {give} `DIR/train`");
    assert_eq!(warned("train").unwrap(), text);
    assert_eq!(classes::parts(&PackSource::Mds(root.to_path_buf())), None);
}

#[test]
fn a_list_of_classes_is_for_class_folders() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("names.txt");
    fs::write(&list, "cats\ndogs\n").unwrap();
    let root = PathBuf::from("pictures");
    let source = PackSource::Folder(root.clone());
    assert_eq!(classes::numbered(source.clone(), None).unwrap(), source);
    let names = vec!["cats".to_string(), "dogs".to_string()];
    let wanted = PackSource::Classed { root: root.clone(), classes: names };
    assert_eq!(classes::numbered(source.clone(), Some(&list)).unwrap(), wanted);
    fs::write(&list, "").unwrap();
    for source in [source, PackSource::Mds(root)] {
        let error = classes::numbered(source, Some(&list)).unwrap_err();
        let coded: &crate::Coded = error.downcast_ref().unwrap();
        assert_eq!(coded.code, exit::USAGE, "{error}");
    }
}

#[test]
fn mds_and_parquet_are_told_by_their_files() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let (mds, parquet) = (root.join("mds"), root.join("parquet"));
    for folder in [&mds, &parquet] {
        fs::create_dir(folder).unwrap();
    }
    fs::write(mds.join("index.json"), r#"{"shards": [], "version": 2}"#).unwrap();
    let files = ["test-0.parquet", "train-0.parquet", "train-1.parquet"];
    let files = files.map(|name| parquet.join(name));
    for file in &files {
        fs::write(file, "").unwrap();
    }
    let choose = |path: &Path, from, split| choose_source(&args(&[path], from, split));
    for from in [Kind::Auto, Kind::Mds] {
        assert_eq!(choose(&mds, from, None).unwrap(), PackSource::Mds(mds.clone()));
    }
    let (test, train) = (files[..1].to_vec(), files[1..].to_vec());
    for from in [Kind::Auto, Kind::Parquet] {
        let chosen = |split| choose(&parquet, from, split).unwrap();
        assert_eq!(chosen(None), PackSource::Parquet(train.clone()));
        assert_eq!(chosen(Some(Split::Train)), PackSource::Parquet(train.clone()));
        assert_eq!(chosen(Some(Split::Test)), PackSource::Parquet(test.clone()));
        assert_eq!(choose(&files[0], from, None).unwrap(), PackSource::Parquet(test.clone()));
    }
    for (path, from) in [(&mds, Kind::Parquet), (&parquet, Kind::Mds), (&parquet, Kind::Idx)] {
        let error = choose(path, from, None).unwrap_err();
        assert!(error.to_string().contains("holds no "), "{error}");
    }
    let labels = Some(root.join("l"));
    let error = choose_source(&PackArgs { labels, ..args(&[&mds], Kind::Auto, None) });
    assert!(error.unwrap_err().to_string().contains("labels of its own"));
}
