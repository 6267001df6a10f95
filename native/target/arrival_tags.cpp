#include "target/arrival_tags.hpp"

#include <algorithm>

namespace vmigrate::pager {

Result<std::unique_ptr<ArrivalTags>> ArrivalTags::open(const std::vector<std::string>& paths,
                                                       const memory::TagKey& key, const FillState& fill,
                                                       bool resume) {
  if (paths.size() != fill.regions().size()) return Error{ErrorCode::kInvalidArgument, 0, "files of tags"};
  std::unique_ptr<ArrivalTags> tags(new ArrivalTags(key));
  for (size_t i = 0; i < paths.size(); ++i) {
    const uint64_t page_count = fill.regions()[i].page_count();
    auto file = resume ? memory::TagFile::reopen(paths[i], page_count)
                       : memory::TagFile::create(paths[i], page_count);
    if (!file) return file.error();
    // An earlier process may have tagged a page and ended before the page was present. It comes again, or
    // turns out to be zero.
    const memory::PresenceMap& presence = *fill.regions()[i].presence;
    for (uint64_t page = 0; resume && page < page_count; ++page) {
      const auto tag = file.value()->tags({PageIndex{page}, 1});
      if (presence.state(PageIndex{page}) != wire::PageState::kPresent)
        std::fill(tag.begin(), tag.end(), std::byte{0});
    }
    tags->files_.push_back(std::move(file).value());
  }
  return tags;
}

Result<std::unique_ptr<ArrivalTags::Writer>> ArrivalTags::writer() {
  auto tagger = memory::PageTagger::create(key_);
  if (!tagger) return tagger.error();
  return std::unique_ptr<Writer>(new Writer(*this, std::move(tagger).value()));
}

Status ArrivalTags::Writer::note(uint32_t region_index, const FilledRegion& region, PageRun run) {
  const auto read = [&region](uint64_t offset_bytes, std::span<std::byte> out) {
    return region.file->read(offset_bytes, out);
  };
  return tagger_->tag(region_index, region.page_bytes(), run, read, tags_.files_[region_index]->tags(run));
}

}  // namespace vmigrate::pager
